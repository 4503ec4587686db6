"""The report room: plots of what was measured, planned or trained, as files that a browser opens.

plots draws them: .png, .svg, or .html, which is one page with the drawing in it.
"""
