"""The policy: pure functions that decide what to do about an incident. Times are seconds of the record's clock."""
