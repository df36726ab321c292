"""What we add to vLLM's HTTP server: the front door and our routes."""
