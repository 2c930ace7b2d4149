"""The report: Tables 4 and 5 beside the paper's numbers, figures, and one HTML page, from a results folder."""
