"""Delta-LLaVA for transformers."""
