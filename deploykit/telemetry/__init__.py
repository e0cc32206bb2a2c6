"""What a Jetson tells about itself while it works: clocks, temperatures, power, over-current events, power mode.

`tegrastats` reads that tool's lines, `board` the files of sysfs and nvpmodel's words. Neither starts anything.
"""
