"""What a run keeps and shows: its folder, its numbers, its live view, its picture."""
