"""onebase_server.kernels"""
