"""A strategy of the app's own, with a cohort that it draws."""
