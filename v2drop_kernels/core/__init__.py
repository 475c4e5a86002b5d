"""What every layer shares: layouts, plans, argument rules, nested structures and result types."""
