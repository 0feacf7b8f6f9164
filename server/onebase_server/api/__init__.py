"""onebase_server.api"""
