"""The page of a results folder, with Tables 4 and 5 beside the paper's, and its figures."""
