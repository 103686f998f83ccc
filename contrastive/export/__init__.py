"""Export the encoder, or its features of a data set, in formats that other tools load."""
