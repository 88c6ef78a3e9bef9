"""Model folders in the Hugging Face layout: where the base model comes from, how weights are
written and checked."""
