"""Choose the settings of a run from the images and the machine: look, decide, say why."""
