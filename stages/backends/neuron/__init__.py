"""The neuron backend: AWS Trainium and Inferentia2, through optimum-neuron."""
