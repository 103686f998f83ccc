"""Build self-contained HTML pages, which the report and several protocols write."""
