"""What panels are drawn with: a line-by-line widget, bars, plots."""
