package istio

// Refuse is refuse.
var Refuse = refuse
