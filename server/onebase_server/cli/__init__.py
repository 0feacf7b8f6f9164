"""The `onebase` command: a thin skin over store, server and training process. Loads torch nowhere itself."""
