"""onebase_server.engine"""
