"""Files from elsewhere: downloads that verify and resume, archives that stay in their folder."""
