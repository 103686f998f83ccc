"""The encoder, or what it makes of a data set, in the form that other tools load."""
