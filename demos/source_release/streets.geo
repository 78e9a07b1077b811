// A block of a town, 300 m x 200 m, seen from above: six buildings of different shapes in the wind from the west.
//
// streets.msh is this file's mesh. gmsh is needed to make it anew, not to run the demo:
//     python3 -m venv gmsh-venv && gmsh-venv/bin/pip install gmsh
//     gmsh-venv/bin/python gmsh-venv/bin/gmsh -2 -format msh22 streets.geo -o streets.msh
// (gmsh of pip needs the libraries libglu1-mesa and libxft2 of the system.)

SetFactory("Built-in");
wide = 7.2;   // size of a cell far from buildings [m]
near = 5.2;   // and at their walls

// The edge of the block.
Point(1) = {0, 0, 0, wide};      Point(2) = {300, 0, 0, wide};
Point(3) = {300, 200, 0, wide};  Point(4) = {0, 200, 0, wide};
Line(1) = {1, 2};  Line(2) = {2, 3};  Line(3) = {3, 4};  Line(4) = {4, 1};
Curve Loop(1) = {1, 2, 3, 4};

// L-shaped house.
Point(11) = {52, 112, 0, near};   Point(12) = {112, 112, 0, near};  Point(13) = {112, 134, 0, near};
Point(14) = {76, 134, 0, near};   Point(15) = {76, 168, 0, near};   Point(16) = {52, 168, 0, near};
Line(11) = {11, 12};  Line(12) = {12, 13};  Line(13) = {13, 14};
Line(14) = {14, 15};  Line(15) = {15, 16};  Line(16) = {16, 11};
Curve Loop(2) = {11, 12, 13, 14, 15, 16};

// Oblong hall, askew to the wind.
Point(21) = {62, 42, 0, near};  Point(22) = {106, 30, 0, near};
Point(23) = {114, 58, 0, near}; Point(24) = {70, 70, 0, near};
Line(21) = {21, 22};  Line(22) = {22, 23};  Line(23) = {23, 24};  Line(24) = {24, 21};
Curve Loop(3) = {21, 22, 23, 24};

// Round tower.
Point(31) = {158, 150, 0, near};
Point(32) = {175, 150, 0, near};  Point(33) = {158, 167, 0, near};
Point(34) = {141, 150, 0, near};  Point(35) = {158, 133, 0, near};
Circle(31) = {32, 31, 33};  Circle(32) = {33, 31, 34};  Circle(33) = {34, 31, 35};  Circle(34) = {35, 31, 32};
Curve Loop(4) = {31, 32, 33, 34};

// Corner house, a triangle.
Point(41) = {150, 62, 0, near};  Point(42) = {206, 74, 0, near};  Point(43) = {178, 108, 0, near};
Line(41) = {41, 42};  Line(42) = {42, 43};  Line(43) = {43, 41};
Curve Loop(5) = {41, 42, 43};

// School around a yard that opens to the west.
Point(51) = {212, 126, 0, near};  Point(52) = {262, 126, 0, near};
Point(53) = {262, 176, 0, near};  Point(54) = {212, 176, 0, near};
Point(55) = {212, 164, 0, near};  Point(56) = {248, 164, 0, near};
Point(57) = {248, 138, 0, near};  Point(58) = {212, 138, 0, near};
Line(51) = {51, 52};  Line(52) = {52, 53};  Line(53) = {53, 54};  Line(54) = {54, 55};
Line(55) = {55, 56};  Line(56) = {56, 57};  Line(57) = {57, 58};  Line(58) = {58, 51};
Curve Loop(6) = {51, 52, 53, 54, 55, 56, 57, 58};

// Hospital.
Point(61) = {226, 28, 0, near};  Point(62) = {266, 28, 0, near};
Point(63) = {266, 58, 0, near};  Point(64) = {226, 58, 0, near};
Line(61) = {61, 62};  Line(62) = {62, 63};  Line(63) = {63, 64};  Line(64) = {64, 61};
Curve Loop(7) = {61, 62, 63, 64};

Plane Surface(1) = {1, 2, 3, 4, 5, 6, 7};

Physical Surface("air", 1) = {1};
Physical Curve("inflow", 1) = {4};
Physical Curve("outflow", 2) = {2};
Physical Curve("walls", 3) = {1, 3};
Physical Curve("obstacles", 4) = {11:16, 21:24, 31:34, 41:43, 51:58, 61:64};
