"""Head to head: ways to need fewer steps, on one teacher, one data set, one metric and one training budget."""
