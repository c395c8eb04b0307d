"""The store service: the engine that writes segments and index, and its gRPC server."""
