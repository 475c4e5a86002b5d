"""What every layer shares: layouts, plans, argument rules, nested structures, schedules and result types."""
