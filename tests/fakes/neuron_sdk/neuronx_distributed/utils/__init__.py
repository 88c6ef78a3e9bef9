"""What optimum-neuron asks about the machine and the model."""
