"""What the reports show: tables, figures, comparisons."""
