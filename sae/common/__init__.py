"""What every package needs: errors, files, progress, processes, the database. It knows nothing of SAEs.

In: nothing. Out: small tools with one meaning everywhere.
Must not import: any other package of this project.
"""
