package sds

// Rest is for a test: how long it takes to look at very many streams cannot be had in one.
var Rest = rest
