"""The `onebase` command: a thin skin over the store, the server and the training process. Loads torch nowhere itself."""
