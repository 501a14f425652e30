"""What an edit did: greedy free generation first, teacher-forced scores second, named as such."""
