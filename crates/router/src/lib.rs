//! Serves clients: OpenAI HTTP and gRPC in, tokens to and from workers.
