"""What all stages of a run share: its folder, records, models, display, tracker and Ray."""
