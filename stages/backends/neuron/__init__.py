"""AWS Trainium, through optimum-neuron."""
