"""huggingface/diffusers: its schedulers, the steps of uniform corruption, what they share."""
