"""From rows of a dataset to rows of token ids: reading, the prompt, tokenising, packing."""
