"""Hard negatives for records, and records that are better left out."""
