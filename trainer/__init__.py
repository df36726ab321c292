"""Training of LoRA and RoRA adapters. Meets the server only in the adapter folder."""
