"""onebase_server.jobs"""
