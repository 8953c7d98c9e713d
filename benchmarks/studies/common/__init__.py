"""What several studies share: images, networks' training, methods, scores, and the tables of reports."""
