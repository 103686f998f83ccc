"""Write the ``report`` page of one run or of several; ``sections.SECTIONS`` lists its sections."""
