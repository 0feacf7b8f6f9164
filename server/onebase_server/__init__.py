"""onebase server: OpenAI-compatible serving of many adapters on one base."""
