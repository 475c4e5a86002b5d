"""The backends: which one serves a call and why (choice), kernel launches (launch), and sizes of the Triton kernels (configs)."""
