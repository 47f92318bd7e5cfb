"""What training *is*: the live objects, as values that can be stored and put back exactly.

This room may import `errors`, torch and NumPy. It never touches a file, a database or a thread.
"""
