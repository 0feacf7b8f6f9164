"""onebase_server.cli"""
