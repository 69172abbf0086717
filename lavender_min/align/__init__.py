"""From a host's attention to a map that can be held against a teacher's: aggregation, parallel attention, the Aligner."""
