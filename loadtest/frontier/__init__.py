"""What cache policies cost in quality and what they save: policies x budgets x tasks through the running engine."""
