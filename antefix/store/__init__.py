"""The store as its users see it: record nouns, the reader of segments, the gRPC client. The engine is in `kvstore/`."""
