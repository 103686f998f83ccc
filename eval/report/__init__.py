"""The ``report`` protocol: one page for one run or for several. ``sections.SECTIONS`` lists what is on it."""
