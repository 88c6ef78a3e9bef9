"""The shards that NeuronTrainer saves, read and turned back into the original model's tensors."""
