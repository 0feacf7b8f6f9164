"""A load generator for any OpenAI-compatible server (ours, vLLM's, llama.cpp's). Knows HTTP only, nothing of ours."""
