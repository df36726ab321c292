"""Serving many adapters beside their base model from one vLLM engine."""
