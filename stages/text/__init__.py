"""From a dataset's examples to packed sequences: reading, the prompt, tokenising, packing."""
